"""Stores: the lifecycle over four atomic primitives, in memory and on Redis or Valkey."""
