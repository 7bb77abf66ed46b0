"""From image to recorded answer: decode, batch, engine, record, answer. No torch."""
