"""One request on its way from targets to a client, whichever door it came through."""
