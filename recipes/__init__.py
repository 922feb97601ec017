"""How each bundled model and reported result was produced."""
