"""Takes events to the URLs that asked for them, signed as Standard Webhooks says (standardwebhooks.com). No Ray."""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import UTC, datetime

import httpx
from standardwebhooks import Webhook

from serving.jobs.outbox import Delivery, Outbox
from serving.jobs.targets import BadTarget, resolve
from serving.metrics import WEBHOOKS

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 3600.0
_AT_ONCE = 8


class Courier:
    """Any number may share an outbox. A target hears of an event at least once; `webhook-id` tells it of a second time.

    Redirects are not followed: where they lead was not looked at, and a webhook's answer is 2xx.
    """

    def __init__(
        self, outbox: Outbox, secret: str, *, allow_private: bool, timeout_seconds: float, give_up_seconds: float
    ) -> None:
        """`secret` starts with `whsec_`. Raises `ValueError` for one that can't be used."""
        self._outbox, self._signer = outbox, Webhook(secret)
        self._allow_private = allow_private
        self._timeout_seconds, self._give_up_seconds = timeout_seconds, give_up_seconds

    async def run(self, poll_seconds: float) -> None:
        """Deliver until this is cancelled. A target that is slow holds up only some of the others."""
        await asyncio.gather(*(self._deliver_for_ever(poll_seconds) for _ in range(_AT_ONCE)))

    async def _deliver_for_ever(self, poll_seconds: float) -> None:
        while True:
            try:
                delivered = await self.deliver()
            except Exception:  # a store that is away for a moment
                _log.warning("no webhook could be delivered", exc_info=True)
                delivered = False
            if not delivered:
                await asyncio.sleep(poll_seconds * random.uniform(0.5, 1.5))

    async def deliver(self) -> bool:
        """Try one delivery that is due; whether there was one."""
        delivery = await self._outbox.claim()
        if delivery is None:
            return False
        try:
            await self._post(delivery)
        except (OSError, BadTarget, httpx.HTTPError) as error:
            await self._failed(delivery, error)
        else:
            WEBHOOKS.add(outcome="delivered")
            await self._outbox.remove(delivery)
        return True

    async def _failed(self, delivery: Delivery, error: Exception) -> None:
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 4 ** (delivery.attempts - 1))
        waited = self._outbox.clock() - delivery.created_at
        if isinstance(error, BadTarget) or waited + pause > self._give_up_seconds:
            WEBHOOKS.add(outcome="given_up")
            _log.warning("%s to %s is given up after %d attempts: %s", *self._said(delivery, error))
            await self._outbox.remove(delivery)
        else:
            WEBHOOKS.add(outcome="retried")
            _log.info("%s to %s failed at attempt %d: %s", *self._said(delivery, error))
            await self._outbox.retry(delivery, pause)

    def _said(self, delivery: Delivery, error: Exception) -> tuple[str, str, int, str]:
        return delivery.id, delivery.url, delivery.attempts, str(error) or type(error).__name__

    async def _post(self, delivery: Delivery) -> None:
        target = await resolve(delivery.url, allow_private=self._allow_private)
        at = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "rushes",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": self._signer.sign(delivery.id, at, delivery.payload),
        }
        # The address that was looked at is called, by the name that the certificate must be for.
        url = httpx.URL(delivery.url)
        headers["Host"] = url.netloc.decode("ascii")
        async with httpx.AsyncClient(timeout=self._timeout_seconds, trust_env=False, follow_redirects=False) as client:
            request = client.build_request(
                "POST",
                url.copy_with(host=target.address),
                content=delivery.payload.encode(),
                headers=headers,
                extensions={"sni_hostname": target.host},
            )
            # Nobody needs the body, and it may be long.
            async with asyncio.timeout(self._timeout_seconds):
                response = await client.send(request, stream=True)
                await response.aclose()
        if not response.is_success:
            raise httpx.HTTPError(f"it answered {response.status_code}")
