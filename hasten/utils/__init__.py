"""What several packages share."""
