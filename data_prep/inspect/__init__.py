"""Looking at what was made: checks and pictures."""
