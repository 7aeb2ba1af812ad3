//! What the same-host path counts.

use std::sync::Arc;

use kvproto::Reason;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::{LocalCall, Metrics, make::Make, names};

/// One call that is being served, until dropped.
pub struct Serving(Arc<Metrics>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.local.calls_in_flight.dec();
    }
}

/// The same-host path's metrics.
pub struct LocalMetrics {
    /// Connections open.
    pub connections: IntGauge,
    /// Calls being served.
    pub calls_in_flight: IntGauge,
    calls: IntCounterVec,
    call_ok: Vec<IntCounter>,
    call_seconds: Vec<Histogram>,
    /// Bytes of blocks whose place was told.
    pub get_bytes: IntCounter,
    /// Bytes copied from staging memory.
    pub put_bytes: IntCounter,
    /// Gets whose blocks are held.
    pub holds: IntGauge,
    /// Bytes of them.
    pub held_bytes: IntGauge,
    /// Holds that ended by time.
    pub holds_expired: IntCounter,
    /// Staging memory granted.
    pub staging_bytes: IntGauge,
}

impl LocalMetrics {
    pub(super) fn new(r: &Make<'_>) -> Self {
        let calls = r.counters(
            names::LOCAL_CALLS,
            "Calls over the same-host path.",
            &["call", "result"],
        );
        let seconds = r.histograms(
            names::LOCAL_CALL_SECONDS,
            "Time per call over the same-host path.",
            &["call"],
        );
        let of_call = |call: &LocalCall| seconds.with_label_values(&[call.as_str()]);
        let ok = |call: &LocalCall| calls.with_label_values(&[call.as_str(), "ok"]);
        Self {
            connections: r.gauge(
                names::LOCAL_CONNECTIONS,
                "Connections over the same-host path.",
            ),
            calls_in_flight: r.gauge(
                names::LOCAL_CALLS_IN_FLIGHT,
                "Calls being served over the same-host path.",
            ),
            call_ok: LocalCall::ALL.iter().map(ok).collect(),
            call_seconds: LocalCall::ALL.iter().map(of_call).collect(),
            calls,
            get_bytes: r.counter(
                names::LOCAL_GET_BYTES,
                "Bytes of blocks told where they lie.",
            ),
            put_bytes: r.counter(names::LOCAL_PUT_BYTES, "Bytes copied from staging memory."),
            holds: r.gauge(names::LOCAL_HOLDS, "Gets whose blocks readers hold."),
            held_bytes: r.gauge(
                names::LOCAL_HELD_BYTES,
                "Bytes that readers hold without a lease.",
            ),
            holds_expired: r.counter(names::LOCAL_HOLDS_EXPIRED, "Holds that ended by time."),
            staging_bytes: r.gauge(names::LOCAL_STAGING_BYTES, "Staging memory granted."),
        }
    }

    /// A call begins; it is over when this is dropped.
    pub fn serving(metrics: &Arc<Metrics>) -> Serving {
        metrics.local.calls_in_flight.inc();
        Serving(Arc::clone(metrics))
    }

    /// Counts one call that is over; `refused` says why it failed as a whole.
    pub fn call(&self, call: LocalCall, refused: Option<Reason>, seconds: f64) {
        match refused {
            None => self.call_ok[call as usize].inc(),
            Some(reason) => self
                .calls
                .with_label_values(&[call.as_str(), reason.as_str()])
                .inc(),
        }
        self.call_seconds[call as usize].observe(seconds);
    }
}
