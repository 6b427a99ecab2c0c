"""From a conversation to an answer, for every front end."""
