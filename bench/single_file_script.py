"""The system that Sluice replaces, as its description says: one process, one file, no spool.

``on_message`` parses the payload, publishes it to Pub/Sub with the site code as ordering key,
and inserts it into BigQuery, inline. The environment variables are the original's.
"""

import json
import os
import sys

import paho.mqtt.client as mqtt
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery, pubsub_v1  # type: ignore[attr-defined] # a namespace package
from paho.mqtt.enums import CallbackAPIVersion

PROJECT = os.environ["GCP_PROJECT_ID"]
TABLE = f"{PROJECT}.{os.environ['BIGQUERY_DATASET']}.{os.environ['BIGQUERY_TABLE']}"
TOPIC = os.environ["PUBSUB_TOPIC"]

publisher = pubsub_v1.PublisherClient(
    publisher_options=pubsub_v1.types.PublisherOptions(enable_message_ordering=True)
)
tables = bigquery.Client(
    project=PROJECT,
    credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
    client_options={"api_endpoint": os.environ["BIGQUERY_EMULATOR_HOST"]},
)


def on_connect(client: mqtt.Client, *_: object) -> None:
    """Subscribe."""
    client.subscribe(os.environ.get("MQTT_TOPIC", "FCTS/FAE/+/SolvExtract/+"), qos=1)


def on_subscribe(*_: object) -> None:
    """Tell the benchmark that it may begin."""
    sys.stdout.write("subscribed\n")
    sys.stdout.flush()


def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
    """Parse, publish, insert."""
    reading = json.loads(message.payload)
    event = {
        "site_code": reading["site_code"],
        "kpi_name": message.topic.rsplit("/", 1)[1],
        "sensor_id": reading["sensor_id"],
        "timestamp": reading["timestamp"],
        "value": reading["value"],
    }
    publisher.publish(
        TOPIC,
        json.dumps(event).encode(),
        ordering_key=reading["site_code"],
        site_code=reading["site_code"],
    )
    row = {
        "event_id": f"{message.topic}/{reading['timestamp']}",
        "site_code": reading["site_code"],
        "sensor_id": reading["sensor_id"],
        "pi_tag": event["kpi_name"],
        "timestamp": reading["timestamp"],
        "value": reading["value"],
        "topic": message.topic,
        "payload": message.payload.decode(),
    }
    errors = tables.insert_rows_json(TABLE, [row])
    if errors:
        sys.stdout.write(f"BigQuery: {errors}\n")


def main() -> None:
    """Run until killed."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = on_connect
    client.on_subscribe = on_subscribe
    client.on_message = on_message
    client.connect(os.environ["MQTT_BROKER"], int(os.environ["MQTT_PORT"]))
    client.loop_forever()


if __name__ == "__main__":
    main()
