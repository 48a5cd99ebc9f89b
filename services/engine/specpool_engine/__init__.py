"""What both engines, the target's and the speculator's, are made of. The only floor that owns torch and devices.

`modeling` turns a model into `CausalModel.forward(segments)` over a paged KV cache; `distributions` carries dense draft
distributions between a pair of processes; `runtime` is the thread that owns a device. Knows no service.
"""
