"""The pods behind the router: which there are, how they are, and which one a request goes to."""
