"""Speed, memory and result tables."""
