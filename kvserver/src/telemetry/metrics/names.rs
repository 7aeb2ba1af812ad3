//! The names of all metrics of the node's own: this file lists every one, and no other file spells one.
//!
//! Units are in the names. A name, once scraped, is somebody's dashboard: it is never changed, only added to.

/// Names of all metrics of the node's own, for tests of dashboards.
pub const NAMES: &[&str] = &[
    BUILD_INFO,
    UPTIME_SECONDS,
    CALLS,
    CALL_SECONDS,
    CALLS_IN_FLIGHT,
    CONNECTIONS,
    WATCHERS,
    GET_ASKED,
    GET_BLOCKS,
    GET_BYTES,
    PUT_BLOCKS,
    PUT_BYTES,
    PUT_REFUSED,
    LOOKUP_ASKED,
    LOOKUP_PRESENT,
    INVALIDATED_BLOCKS,
    REMOVED_BLOCKS,
    MOVER_WRITES,
    MOVER_DROPS,
    MOVER_READS,
    MOVER_READ_SECONDS,
    TIER_CAPACITY_BYTES,
    TIER_USED_BYTES,
    TIER_BLOCKS,
    TIER_IN_SERVICE,
    TIER_QUEUED_BYTES,
    TIER_WRITTEN_TODAY_BYTES,
    TIER_DROPS,
    TIER_OWED_REMOVALS,
    ARENA_BYTES,
    LEASES,
    LEASED_BYTES,
    LEASE_OVERFLOW_BYTES,
    NAMESPACES,
    CLUSTER_MEMBERS,
    CLUSTER_SUSPECTS,
    CLUSTER_VIEW_CHANGES,
    CLUSTER_GOSSIP_BYTES,
    CLUSTER_GOSSIP_REFUSED,
    LOCAL_CONNECTIONS,
    LOCAL_CALLS,
    LOCAL_CALL_SECONDS,
    LOCAL_GET_BYTES,
    LOCAL_PUT_BYTES,
    LOCAL_CALLS_IN_FLIGHT,
    LOCAL_HOLDS,
    LOCAL_HELD_BYTES,
    LOCAL_HOLDS_EXPIRED,
    LOCAL_STAGING_BYTES,
    MOTION_FETCHED_BLOCKS,
    MOTION_FETCHED_BYTES,
    MOTION_FETCH_SECONDS,
    MOTION_MOVED_RUNS,
    MOTION_MOVED_BYTES,
    MOTION_MOVE_SECONDS,
    MOTION_WAITING_RUNS,
    MOTION_WAITING_BYTES,
    MOTION_REFUSED,
    MOTION_REPLICA_BLOCKS,
    MOTION_HOT_RUNS,
    MOTION_HOT_COPIES,
    PEER_CALLS,
];
/// Always 1; the version is the label.
pub const BUILD_INFO: &str = "terrace_build_info";
/// Seconds since the node started.
pub const UPTIME_SECONDS: &str = "terrace_uptime_seconds";
/// Calls answered, by method and gRPC code.
pub const CALLS: &str = "terrace_calls_total";
/// Time from a call's head to its last byte handed to the transport.
pub const CALL_SECONDS: &str = "terrace_call_seconds";
/// Calls being served.
pub const CALLS_IN_FLIGHT: &str = "terrace_calls_in_flight";
/// Connections open, by transport.
pub const CONNECTIONS: &str = "terrace_connections";
/// Watch streams open.
pub const WATCHERS: &str = "terrace_watchers";
/// Blocks that gets were asked for.
pub const GET_ASKED: &str = "terrace_get_blocks_asked_total";
/// Blocks of gets by where they came from, or why they did not come. Sums to the asked.
pub const GET_BLOCKS: &str = "terrace_get_blocks_total";
/// Bytes handed out by gets.
pub const GET_BYTES: &str = "terrace_get_bytes_total";
/// Blocks of puts by what became of them.
pub const PUT_BLOCKS: &str = "terrace_put_blocks_total";
/// Bytes taken in by puts.
pub const PUT_BYTES: &str = "terrace_put_bytes_total";
/// Blocks of puts refused, by reason.
pub const PUT_REFUSED: &str = "terrace_put_refused_blocks_total";
/// Blocks that lookups were asked for.
pub const LOOKUP_ASKED: &str = "terrace_lookup_blocks_asked_total";
/// Blocks that lookups found.
pub const LOOKUP_PRESENT: &str = "terrace_lookup_blocks_present_total";
/// Blocks forgotten because somebody asked for it.
pub const INVALIDATED_BLOCKS: &str = "terrace_invalidated_blocks_total";
/// Blocks that left a tier, by reason.
pub const REMOVED_BLOCKS: &str = "terrace_removed_blocks_total";
/// Blocks written to a lower tier, by tier.
pub const MOVER_WRITES: &str = "terrace_mover_written_blocks_total";
/// Blocks a lower tier did not take, by tier and reason.
pub const MOVER_DROPS: &str = "terrace_mover_dropped_blocks_total";
/// Blocks read from a lower tier, by tier and result.
pub const MOVER_READS: &str = "terrace_mover_read_blocks_total";
/// Time of one read from a lower tier, waiting included.
pub const MOVER_READ_SECONDS: &str = "terrace_mover_read_seconds";
/// Bytes a tier may hold.
pub const TIER_CAPACITY_BYTES: &str = "terrace_tier_capacity_bytes";
/// Bytes a tier holds.
pub const TIER_USED_BYTES: &str = "terrace_tier_used_bytes";
/// Blocks a tier holds.
pub const TIER_BLOCKS: &str = "terrace_tier_blocks";
/// 1 while a tier is in service.
pub const TIER_IN_SERVICE: &str = "terrace_tier_in_service";
/// Bytes waiting to be written.
pub const TIER_QUEUED_BYTES: &str = "terrace_tier_queued_bytes";
/// Bytes written since midnight UTC, what the wear budget counts.
pub const TIER_WRITTEN_TODAY_BYTES: &str = "terrace_tier_written_today_bytes";
/// Blocks a tier refused or dropped, by reason, as the tier counts them.
pub const TIER_DROPS: &str = "terrace_tier_dropped_blocks";
/// Blocks that were invalidated and that a tier could not yet record as gone.
pub const TIER_OWED_REMOVALS: &str = "terrace_tier_owed_removals";
/// Bytes of the arena by state: capacity, ready, used (rounded to slots), requested, largest free.
pub const ARENA_BYTES: &str = "terrace_arena_bytes";
/// Leases held.
pub const LEASES: &str = "terrace_leases";
/// Bytes that leases pin.
pub const LEASED_BYTES: &str = "terrace_leased_bytes";
/// Bytes of leased blocks that found no slot and lie in ordinary memory.
pub const LEASE_OVERFLOW_BYTES: &str = "terrace_lease_overflow_bytes";
/// Namespaces known.
pub const NAMESPACES: &str = "terrace_namespaces";
/// Members of the cluster as this node sees it, by state.
pub const CLUSTER_MEMBERS: &str = "terrace_cluster_members";
/// Members that are silent, and keep their place for a while.
pub const CLUSTER_SUSPECTS: &str = "terrace_cluster_suspects";
/// Changes of the view that moved owners.
pub const CLUSTER_VIEW_CHANGES: &str = "terrace_cluster_view_changes_total";
/// Bytes of gossip, by direction.
pub const CLUSTER_GOSSIP_BYTES: &str = "terrace_cluster_gossip_bytes_total";
/// Datagrams that were not of this cluster, or damaged.
pub const CLUSTER_GOSSIP_REFUSED: &str = "terrace_cluster_gossip_refused_total";
/// Connections over the same-host path.
pub const LOCAL_CONNECTIONS: &str = "terrace_local_connections";
/// Calls over the same-host path, by call and result (ok, or the reason of the refusal).
pub const LOCAL_CALLS: &str = "terrace_local_calls_total";
/// Time from a same-host call's last byte read to its answer's last byte written.
pub const LOCAL_CALL_SECONDS: &str = "terrace_local_call_seconds";
/// Bytes of blocks whose place was told over the same-host path.
pub const LOCAL_GET_BYTES: &str = "terrace_local_get_bytes_total";
/// Bytes copied from the staging memory of same-host clients.
pub const LOCAL_PUT_BYTES: &str = "terrace_local_put_bytes_total";
/// Same-host calls being served.
pub const LOCAL_CALLS_IN_FLIGHT: &str = "terrace_local_calls_in_flight";
/// Gets without a lease whose blocks same-host readers keep where they lie.
pub const LOCAL_HOLDS: &str = "terrace_local_holds";
/// Bytes that same-host readers keep without a lease.
pub const LOCAL_HELD_BYTES: &str = "terrace_local_held_bytes";
/// Holds that ended by time, not by their reader's word.
pub const LOCAL_HOLDS_EXPIRED: &str = "terrace_local_holds_expired_total";
/// Bytes of staging memory granted to same-host clients.
pub const LOCAL_STAGING_BYTES: &str = "terrace_local_staging_bytes";
/// Blocks that came from peers, by what became of them here.
pub const MOTION_FETCHED_BLOCKS: &str = "terrace_motion_fetched_blocks_total";
/// Bytes of blocks that came from peers.
pub const MOTION_FETCHED_BYTES: &str = "terrace_motion_fetched_bytes_total";
/// Time per run that was fetched from peers, over all who were asked.
pub const MOTION_FETCH_SECONDS: &str = "terrace_motion_fetch_seconds";
/// Runs handed over to another owner.
pub const MOTION_MOVED_RUNS: &str = "terrace_motion_moved_runs_total";
/// Bytes of blocks handed over to another owner.
pub const MOTION_MOVED_BYTES: &str = "terrace_motion_moved_bytes_total";
/// Time per run handed over.
pub const MOTION_MOVE_SECONDS: &str = "terrace_motion_move_seconds";
/// Runs that have another owner now and are still to go.
pub const MOTION_WAITING_RUNS: &str = "terrace_motion_waiting_runs";
/// Bytes of them, and of what another owner refused.
pub const MOTION_WAITING_BYTES: &str = "terrace_motion_waiting_bytes";
/// Blocks that could not be moved or fetched, by reason.
pub const MOTION_REFUSED: &str = "terrace_motion_refused_blocks_total";
/// Blocks passed on to a further owner of their run.
pub const MOTION_REPLICA_BLOCKS: &str = "terrace_motion_replica_blocks_total";
/// Runs that have a second owner for a while, because many read them.
pub const MOTION_HOT_RUNS: &str = "terrace_motion_hot_runs";
/// Runs that were given to a second owner.
pub const MOTION_HOT_COPIES: &str = "terrace_motion_hot_copies_total";
/// Calls of other nodes being served.
pub const PEER_CALLS: &str = "terrace_peer_calls";
