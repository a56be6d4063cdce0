"""What a trained generator does: the papers' figures as functions."""
