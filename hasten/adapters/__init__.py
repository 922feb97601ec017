"""Models of other libraries, and other libraries that run models."""
