"""The reference of plain paho: a subscriber as its documentation has it, which stores nothing.

``python -m bench.paho_subscriber PORT COUNT`` prints ``done`` after COUNT messages.
"""

import sys

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion


def main(port: int, count: int) -> None:
    """Receive ``count`` messages at QoS 1 and end."""
    received = 0

    def on_connect(client: mqtt.Client, *_: object) -> None:
        client.subscribe("FCTS/FAE/+/SolvExtract/+", qos=1)

    def on_subscribe(*_: object) -> None:
        sys.stdout.write("subscribed\n")
        sys.stdout.flush()

    def on_message(client: mqtt.Client, *_: object) -> None:
        nonlocal received
        received += 1
        if received == count:
            client.disconnect()

    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="bench-paho")
    client.on_connect = on_connect
    client.on_subscribe = on_subscribe
    client.on_message = on_message
    client.connect("127.0.0.1", port)
    client.loop_forever()
    sys.stdout.write(f"done {received}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
