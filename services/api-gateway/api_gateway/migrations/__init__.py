"""The steps from one shape of the database to the next; applied at a gateway's start."""
