"""A server, and a client of OpenAI's API that asks it; works the same with langchain and others.

pip install openai
python examples/server_and_client.py [MODEL]
"""

import socket
import subprocess
import sys
import time
import urllib.request

import openai

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-m", "octavo", "serve", model, "--max-model-len", "1024"]
server = subprocess.Popen([*command, "--port", str(port)])
try:
    url = f"http://127.0.0.1:{port}"
    while True:  # it answers 503 until the model is loaded
        try:
            urllib.request.urlopen(f"{url}/health")
            break
        except OSError:
            if server.poll() is not None:
                sys.exit("the server has ended")
            time.sleep(0.2)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
finally:
    server.terminate()
    server.wait()
