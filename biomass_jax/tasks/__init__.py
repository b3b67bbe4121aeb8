"""What a run learns: model, loss and scores of each task."""
