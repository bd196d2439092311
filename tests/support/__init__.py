"""What tests share: real servers, golden data, strategies for arrays."""
