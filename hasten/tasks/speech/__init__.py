"""Text to speech in a few steps: text, acoustic model, vocoder."""
