"""Mixed traffic against one server for a given time, and what must stay the same meanwhile."""
