"""Arrays and structures to messages and back; specs; the error catalogue. Knows neither gRPC nor tensorflow."""
