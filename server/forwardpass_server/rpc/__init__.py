"""The gRPC layer: servicers, codec, interceptor and streams, without logic of the service itself."""
