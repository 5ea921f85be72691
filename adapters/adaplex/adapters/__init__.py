"""What an adapter is: reading, checking, lowering, naming and storing it.

Its surface for other packages is `api`, and `errors`. Imports neither grpc nor the engine.
"""
