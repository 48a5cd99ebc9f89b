"""What the router remembers of requests: leases, quotas, journals; in memory, Redis or Valkey.

The store is never on the path of a token: writes happen behind the streams, and every write may be repeated.
"""
