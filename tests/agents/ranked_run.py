"""A rank of a run that asks agents through Cast.conduct: python ranked_run.py OUT KIND. Writes OUT/rank_N.json."""

import asyncio
import hashlib
import json
import sys
from pathlib import Path

from wizard_engine.agents import Cast, Reply, Request, ranks, register
from wizard_engine.data.records import Message
from wizard_engine.runtime.process import start, stop

OUT, KIND = Path(sys.argv[1]), sys.argv[2]
RUNTIME = start("cpu")


class Model:
    """Answers in batches, as a model of this process does."""

    name = fingerprint = "model"

    def respond(self, requests):
        if f"error {RUNTIME.rank}" == KIND:
            raise ValueError("row 5: the model is broken")
        if KIND == "short":
            return []
        return [Reply(hashlib.sha256(request.messages[-1].content.encode()).hexdigest()) for request in requests]


class Endpoint:
    """Answers many calls at once, each after some time."""

    name = fingerprint = "endpoint"
    concurrency, ended = 16, ""

    async def reply(self, request):
        assert RUNTIME.is_main
        await asyncio.sleep(2.0 if KIND == "wait" and request.seed == 7 else 0.002 * (request.seed % 5))
        return Reply(f"told: {request.messages[-1].content[:9]}")

    async def aclose(self):
        pass


register("test:model", Model)
if KIND == "wait":
    ranks.KEEPALIVE_SECONDS = 0.2
told = []


def work():
    scheduler, model, endpoint, out = cast.scheduler, cast.agent("test:model"), Endpoint(), {}
    tell = cast.ranks._tell
    cast.ranks._tell = lambda order: (told.append(order[0]), tell(order))

    async def row(number):
        first = await scheduler.ask(endpoint, Request("answer", (Message("user", f"row {number}"),), seed=number))
        second = await scheduler.ask(model, Request("answer", (Message("user", first.text),), seed=number))
        if KIND == "main error" and number == 40:
            raise ValueError("row 40: of rank 0")
        return second.text

    scheduler.run(scheduler.rows(range(60), row, out.__setitem__, desc="rows", agents=(model, endpoint)))
    return [out[number] for number in range(60)]


cast = Cast(OUT / "ledger.sqlite", RUNTIME, batch_size=8, quiet=True)
try:
    texts = cast.conduct(work)
    result = hashlib.sha256(" ".join(texts).encode()).hexdigest()[:12]
except ValueError as error:
    result = f"{error}"
cast.close()
(OUT / f"rank_{RUNTIME.rank}.json").write_text(json.dumps({"result": result, "waits": told.count("wait")}))
stop()
