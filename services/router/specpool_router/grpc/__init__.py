"""The gRPC door: translates between messages and the router's own requests, and decides nothing."""
