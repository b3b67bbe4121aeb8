"""Small shards whose labels follow from the image, for tests of training."""
