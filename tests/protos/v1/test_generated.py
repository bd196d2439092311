"""The checked-in generated code matches the .proto files."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import pytest
from google.protobuf import descriptor_pb2

import forwardpass.v1

FOLDER = pathlib.Path(forwardpass.v1.__file__).parent
PROTOS = sorted(FOLDER.glob("*.proto"))


@pytest.mark.parametrize("proto", PROTOS, ids=lambda path: path.name)
def test_the_checked_in_code_has_the_descriptor_of_its_proto_file(proto, tmp_path):
    # Compiled by the installed compiler. It may differ from the one that generated the code, but reads the same file.
    root = FOLDER.parent.parent
    written = tmp_path / "set.pb"
    arguments = [f"--proto_path={root}", f"--descriptor_set_out={written}", str(proto.relative_to(root))]
    # In a process of its own, because its protobuf conflicts with that of TensorFlow.
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
    (expected,) = descriptor_pb2.FileDescriptorSet.FromString(written.read_bytes()).file
    found = descriptor_pb2.FileDescriptorProto()
    importlib.import_module(f"forwardpass.v1.{proto.stem}_pb2").DESCRIPTOR.CopyToProto(found)
    for field in (field for message in _all_messages(expected) for field in message.field):
        field.ClearField("json_name")
    assert found == expected


def _all_messages(parent):
    for message in getattr(parent, "message_type", None) or getattr(parent, "nested_type", []):
        yield message
        yield from _all_messages(message)


def test_generated_code_exists_for_each_proto_file_and_for_no_other():
    assert {path.stem + "_pb2" for path in PROTOS} == {path.stem for path in FOLDER.glob("*_pb2.py")}


def test_the_stubs_have_every_method():
    stubs = importlib.import_module("forwardpass.v1.service_pb2_grpc")
    methods = {method.name for method in forwardpass.v1.SERVICE_FILE.services_by_name["FunctionalModelService"].methods}
    assert methods <= set(dir(stubs.FunctionalModelServiceServicer))


def test_the_messages_import_no_grpc():
    assert "forwardpass.v1.service_pb2" in sys.modules
    source = (FOLDER / "service_pb2.py").read_text()
    assert "import grpc" not in source
