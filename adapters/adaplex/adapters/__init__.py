"""What an adapter is: reading, checking, lowering and keeping it. Knows no wire and no engine."""
