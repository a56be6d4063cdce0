"""Prompts as pixels: what a backbone's patch embedding can express, inversion of trained libraries, and pictures."""
