//! A BAR's parts: what the guest reaches directly, and what is looked at on its way. Pure.

/// The host's page size: what is mapped is mapped by pages.
pub const PAGE: u64 = 4096;

/// Bytes of a region from `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// The first byte.
    pub start: u64,
    /// The byte behind the last.
    pub end: u64,
}

impl Area {
    /// Whether an access of `length` bytes at `offset` touches it.
    pub fn touches(self, offset: u64, length: usize) -> bool {
        offset < self.end && offset.saturating_add(length as u64) > self.start
    }
}

/// A region of a function's descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRegion {
    /// Where it begins in the descriptor's file.
    pub offset: u64,
    /// Its size in bytes; 0 when it is not there.
    pub size: u64,
    /// What of it can be mapped.
    pub areas: Vec<Area>,
}

/// The whole pages of `areas` that lie in a region of `size` bytes and hold nothing of `trapped`.
pub fn direct(size: u64, areas: &[Area], trapped: &[Area]) -> Vec<Area> {
    let mut rest: Vec<Area> = areas
        .iter()
        .map(|area| Area {
            start: area.start.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX),
            end: area.end.min(size) & !(PAGE - 1),
        })
        .collect();
    for hole in trapped {
        let start = hole.start & !(PAGE - 1);
        let end = hole.end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        rest = rest
            .into_iter()
            .flat_map(|area| {
                [
                    Area { start: area.start, end: area.end.min(start) },
                    Area { start: area.start.max(end), end: area.end },
                ]
            })
            .filter(|area| area.start < area.end)
            .collect();
    }
    rest.retain(|area| area.start < area.end);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn area(start: u64, end: u64) -> Area {
        Area { start, end }
    }

    #[test]
    fn table_in_the_middle_splits_the_region() {
        let areas = direct(0x4000, &[area(0, 0x4000)], &[area(0x1010, 0x1040)]);
        assert_eq!(areas, [area(0, 0x1000), area(0x2000, 0x4000)]);
        assert_eq!(direct(0x4000, &[area(0, 0x4000)], &[]), [area(0, 0x4000)]);
        assert!(direct(0x1000, &[area(0, 0x1000)], &[area(0x800, 0x900)]).is_empty());
        assert!(direct(0x800, &[area(0, 0x800)], &[]).is_empty());
    }

    #[test]
    fn access_touches_what_it_overlaps() {
        let table = area(0x1000, 0x1010);
        assert!(table.touches(0xffc, 8) && table.touches(0x100f, 1));
        assert!(!table.touches(0xffc, 4) && !table.touches(0x1010, 4));
        assert!(!table.touches(u64::MAX, 8));
    }

    proptest! {
        #[test]
        fn what_is_direct_is_pages_of_the_region_without_a_trapped_byte(
            size in 0u64..0x20000,
            areas in proptest::collection::vec((0u64..0x20000, 0u64..0x20000), 0..4),
            trapped in proptest::collection::vec((0u64..0x20000, 1u64..0x3000), 0..3),
        ) {
            let areas: Vec<Area> = areas.iter().map(|&(a, b)| area(a.min(b), a.max(b))).collect();
            let trapped: Vec<Area> = trapped.iter().map(|&(at, long)| area(at, at + long)).collect();
            for found in direct(size, &areas, &trapped) {
                prop_assert!(found.start % PAGE == 0 && found.end % PAGE == 0);
                prop_assert!(found.start < found.end && found.end <= size);
                let length = (found.end - found.start) as usize;
                prop_assert!(trapped.iter().all(|hole| !hole.touches(found.start, length)));
                prop_assert!(areas.iter().any(|a| a.start <= found.start && found.end <= a.end));
            }
        }
    }
}
