"""Questions over files: documents, retrieval, citations."""
