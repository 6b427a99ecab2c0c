"""Files and datasets as rows: which files, how they are decoded, and where each row is."""
