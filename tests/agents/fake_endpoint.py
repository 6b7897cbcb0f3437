"""An OpenAI-compatible endpoint on a thread, whose behaviour a test writes down as a function."""

import asyncio
import json
import threading
import time
from collections import Counter

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from wizard_engine.agents import Request, prompts
from wizard_engine.agents.estimate import DEFAULT_LENGTHS, stand_in_text
from wizard_engine.data.records import Message

LENGTHS = DEFAULT_LENGTHS | {"answer": 12, "evolve": 8, "rewrite": 8}


def answer(text="fine", tokens=10, finish="stop", **message):
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": tokens // 2, "completion_tokens": tokens - tokens // 2, "total_tokens": tokens}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def teach(body, _):
    """A language model's part: a readable reply to whatever prompt it is."""
    messages = tuple(Message(item["role"], item["content"]) for item in body["messages"])
    for task in prompts.TASKS:
        try:
            prompts.parse(task, messages[-1].content)
        except ValueError:
            continue
        return answer(stand_in_text(Request(task, messages[-1:]), body["model"], LENGTHS))
    return answer(stand_in_text(Request("answer", messages), body["model"], LENGTHS))


class QuickServer(uvicorn.Server):
    """Looks for its end every 5 ms, not every 100."""

    async def main_loop(self):
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


class Fake:
    """An endpoint whose behaviour is a function of (request body, how often it came); a list of what it was asked."""

    def __init__(self, behave):
        self.behave, self.asked, self.seen, self.at_once, self.most = behave, [], Counter(), 0, 0
        self.keys = set()

        async def complete(request):
            body = await request.json()
            self.asked.append(body)
            self.keys.add(request.headers.get("authorization"))
            key = json.dumps(body, sort_keys=True)
            self.seen[key] += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            try:
                behaviour = self.behave(body, self.seen[key])
                behaviour = await behaviour if asyncio.iscoroutine(behaviour) else behaviour
            finally:
                self.at_once -= 1
            return JSONResponse(behaviour) if isinstance(behaviour, dict) else behaviour

        config = uvicorn.Config(
            Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])]),
            port=0,
            log_level="error",
            lifespan="off",
        )
        self.socket = config.bind_socket()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.server = QuickServer(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self.server.force_exit = self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()
