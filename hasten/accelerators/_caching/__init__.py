"""Feature caching between steps: split points, key steps and the wrapper that reuses features."""
