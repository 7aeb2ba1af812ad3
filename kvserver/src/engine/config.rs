//! Settings of the engine, as plain values.

use super::budget::KindBudget;

/// What of a block that was not asked to be stored is offered to the tier below RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demotion {
    /// Every block.
    Open,
    /// Blocks that a lookup has found at least once.
    Reuse,
}

/// A setting that is out of bounds or at odds with another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct EngineConfigError {
    /// The field at fault.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Shards of the index, rounded up to a power of two; 1 to 4096, default 64.
    pub shards: usize,
    /// RAM for blocks, bytes: what the arena holds.
    pub capacity_bytes: u64,
    /// KV blocks' part of it.
    pub kv: KindBudget,
    /// Checkpoint chunks' part of it.
    pub checkpoint: KindBudget,
    /// Time of a lease whose caller names none, milliseconds; default 10,000.
    pub lease_default_ttl_ms: u64,
    /// No lease is granted or renewed for longer, milliseconds; default 600,000.
    pub lease_max_ttl_ms: u64,
    /// Bytes that all leases together may pin, each block counted once; at most half of the capacity.
    pub lease_bytes_total: u64,
    /// Bytes that one owner's leases may cover.
    pub lease_bytes_per_owner: u64,
    /// Ordinary memory that leased blocks may take while they find no slot, bytes; default 256 MiB.
    pub overflow_bytes: u64,
    /// Leases at a time; default 65,536.
    pub max_leases: usize,
    /// Losses remembered to answer why a block is gone; default 65,536.
    pub losses: usize,
    /// Events a listener may lag behind before it loses some; default 4,096.
    pub event_ring: usize,
    /// What is offered to the tier below; default reuse.
    pub demotion: Demotion,
    /// When a refused writer should come again, milliseconds; default 20.
    pub retry_after_ms: u32,
}

impl EngineConfig {
    /// Defaults for so much RAM: KV may use all of it, checkpoints half, neither has a reserve.
    #[must_use]
    pub fn for_capacity(capacity_bytes: u64) -> Self {
        Self {
            shards: 64,
            capacity_bytes,
            kv: KindBudget {
                reserve_bytes: 0,
                ceiling_bytes: capacity_bytes,
            },
            checkpoint: KindBudget {
                reserve_bytes: 0,
                ceiling_bytes: capacity_bytes / 2,
            },
            lease_default_ttl_ms: 10_000,
            lease_max_ttl_ms: 600_000,
            lease_bytes_total: capacity_bytes / 2,
            lease_bytes_per_owner: capacity_bytes / 4,
            overflow_bytes: 256 << 20,
            max_leases: 65_536,
            losses: 65_536,
            event_ring: 4_096,
            demotion: Demotion::Reuse,
            retry_after_ms: 20,
        }
    }

    /// Whether the fields agree.
    ///
    /// # Errors
    /// The first field that does not.
    pub fn validate(&self) -> Result<(), EngineConfigError> {
        let wrong = |field, problem: String| Err(EngineConfigError { field, problem });
        let capacity = self.capacity_bytes;
        if capacity < kvgpu::PAGE_BYTES as u64 {
            return wrong(
                "capacity_bytes",
                format!("{capacity} is less than one arena page"),
            );
        }
        if !(1..=4096).contains(&self.shards) {
            return wrong("shards", format!("{} is not within 1 to 4096", self.shards));
        }
        for (field, budget) in [("kv", self.kv), ("checkpoint", self.checkpoint)] {
            let KindBudget {
                reserve_bytes,
                ceiling_bytes,
            } = budget;
            if reserve_bytes > ceiling_bytes || ceiling_bytes > capacity {
                return wrong(
                    field,
                    format!(
                        "reserve {reserve_bytes} ≤ ceiling {ceiling_bytes} ≤ capacity {capacity} must hold"
                    ),
                );
            }
        }
        let reserves = self
            .kv
            .reserve_bytes
            .saturating_add(self.checkpoint.reserve_bytes);
        if reserves > capacity {
            return wrong(
                "kv",
                format!("both reserves together, {reserves}, exceed the capacity {capacity}"),
            );
        }
        if self.lease_bytes_total > capacity / 2 {
            let total = self.lease_bytes_total;
            return wrong(
                "lease_bytes_total",
                format!("{total} is more than half of the capacity {capacity}"),
            );
        }
        if self.lease_default_ttl_ms == 0 || self.lease_default_ttl_ms > self.lease_max_ttl_ms {
            let (default, max) = (self.lease_default_ttl_ms, self.lease_max_ttl_ms);
            return wrong(
                "lease_default_ttl_ms",
                format!("{default} is not within 1 to {max}"),
            );
        }
        for (field, value) in [
            ("max_leases", self.max_leases),
            ("losses", self.losses),
            ("event_ring", self.event_ring),
        ] {
            if value == 0 {
                return wrong(field, "must be at least 1".into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_agree_and_a_disagreement_names_its_field() {
        let config = EngineConfig::for_capacity(1 << 20);
        assert_eq!(config.validate(), Ok(()));
        let field = |change: &dyn Fn(&mut EngineConfig)| {
            let mut config = EngineConfig::for_capacity(1 << 20);
            change(&mut config);
            config.validate().unwrap_err().field
        };
        assert_eq!(field(&|c| c.kv.ceiling_bytes = 2 << 20), "kv");
        assert_eq!(
            field(&|c| c.checkpoint.reserve_bytes = 1 << 20),
            "checkpoint"
        );
        assert_eq!(
            field(&|c| c.lease_bytes_total = 1 << 20),
            "lease_bytes_total"
        );
        assert_eq!(
            field(&|c| c.lease_default_ttl_ms = 0),
            "lease_default_ttl_ms"
        );
        assert_eq!(field(&|c| c.shards = 0), "shards");
        assert_eq!(field(&|c| c.max_leases = 0), "max_leases");
    }
}
