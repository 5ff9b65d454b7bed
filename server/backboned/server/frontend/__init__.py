"""A front end: a process that takes calls on the public port, prepares their images, and hands them to the daemon."""
