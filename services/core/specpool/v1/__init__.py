"""Generated protobuf and gRPC code of proto/specpool/v1; see proto/generate.sh."""
