"""What an adapter is once lowered: primitives for each module of the base."""
