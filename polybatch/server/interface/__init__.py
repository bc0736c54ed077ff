"""What goes over HTTP, as types that the OpenAPI document is made of."""
