"""What a portable program weighs, and how far it is from the model that it was made of."""
