"""Prompts as pixels: the range of the patch embedding, inversion of trained libraries, and export of pictures."""
