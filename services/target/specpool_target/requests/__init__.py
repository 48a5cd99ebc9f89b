"""From a message to a request that the engine can run, and from the engine's updates to a stream of messages."""
