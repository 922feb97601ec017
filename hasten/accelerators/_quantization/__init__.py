"""Post-training quantisation: quantisers, calibration, rounding, bias correction and the session that applies them."""
