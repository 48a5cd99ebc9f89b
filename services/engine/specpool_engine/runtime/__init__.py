"""What both engines are made of: one thread that owns the model, and what stands around it.

    wire (gRPC, event loop)  --commands-->  engine thread  --outbox-->  wire

For targets and speculators; it imports neither. Start reading at `engine_thread`.

The seam between wire and engine is narrow, because soon the two may live in different processes:

- The wire asks by `EngineThread.call` and `EngineThread.submit`. What a command carries is plain data: ids, token ids,
  checked requests, messages of the protocol. The engine looks its own objects up by id.
- The engine answers through an `Outbox`: a list of plain items per step, each with the id of the stream or connection
  that it is for. The wire alone knows streams and who listens to them.
- Either side reads what the other publishes as a whole (`Heartbeat`, a snapshot or load for status), and waits for
  nothing: the event loop never takes a lock that a step holds.
- Two objects still cross with a target's sequence: its detokenizer, where stop strings end the output, and its place in
  the pool of speculators. The wire makes them; the engine alone uses them until the sequence ends.
- A failure crosses once: `on_failed` is called on the event loop, which ends every stream that it knows.
"""
