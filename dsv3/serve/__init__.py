"""Generation: a latent cache in buckets, chunked prefill, absorbed decoding, MTP drafts, streaming.

    engine = Engine(cfg, params, router, tokenizer=tokenizer, speculative=1)
    for event in engine.stream([Request("def main():", stop=["\\n\\n"])]):
        print(event.text, end="")
"""

from dsv3.serve.engine import Engine
from dsv3.serve.request import Completion, Event, Request, check_requests
from dsv3.serve.text import TextStream

__all__ = ["Completion", "Engine", "Event", "Request", "TextStream", "check_requests"]
