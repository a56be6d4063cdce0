"""Analysis of trained generators: the papers' figures as functions."""
