"""A request log of one's own."""

from __future__ import annotations

from dnr_recbole.errors import ConfigError
from dnr_recbole.identity import FileDigests
from dnr_recbole.requestlog.building import build
from dnr_recbole.requestlog.request_log import RequestLog
from dnr_recbole.sources import Prepared, Source, register_source


@register_source("log")
class Log(Source):
    """The files that ``requests``, ``users_file``, ``items_file`` and ``item_vectors`` name."""

    def check(self, config) -> None:
        if not config["requests"]:
            raise ConfigError("source=log needs the key requests: the file of the request log")

    def files(self, config) -> FileDigests:
        return RequestLog.of(config).digests()

    def shared(self, config, files=None) -> RequestLog:
        return RequestLog.of(config)

    def prepare(self, config, shared: RequestLog, files=None) -> Prepared:
        built = build(config, shared)
        return Prepared(built.data, preprocessor=built.preprocessor, sample=built.sample, notes=built.maker.notes)
