"""What handing out work costs, and whether it is safe."""
