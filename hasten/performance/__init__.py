"""What sampling costs: measured, counted and predicted."""
