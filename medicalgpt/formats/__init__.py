"""Rows in the forms that people have, as the forms that the stages train on, and back."""
