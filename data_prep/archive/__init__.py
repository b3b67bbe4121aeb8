"""NASA's archives: search and download."""
